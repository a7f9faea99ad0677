"""Conversations under a chat template: its text, where the turns of the assistant are in it, and the token ids."""

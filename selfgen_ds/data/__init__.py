"""Data: sources of text -> tokenized rows -> the micro-batches of each optimizer step."""

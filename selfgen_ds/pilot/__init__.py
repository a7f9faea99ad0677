"""`selfgen-ds pilot`: does a method help on a user's own data? A study of a few small runs, and its verdict."""

"""Rows -> (prompt, response) -> tokens -> micro-batches."""

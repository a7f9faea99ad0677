"""The rounds of BASH and RAC: drawn, written, and read as training rows."""

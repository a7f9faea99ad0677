"""What training costs: measured (bench)."""

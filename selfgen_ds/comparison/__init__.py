"""The comparison of evaluated runs: groups of seeds, intervals, verdicts, plots and the report."""

"""Looking at runs: the report, the comparison of runs, the preview of rows, and what a terminal shows of them."""

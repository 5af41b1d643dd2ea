"""The machinery of studies: runs, results, statistics, tables and plots."""

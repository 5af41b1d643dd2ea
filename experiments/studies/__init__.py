"""Tools for studies: runs, results, statistics, tables and plots."""

"""Files of users and benchmarks: rows of tables, indexed collections, runs and judgments."""

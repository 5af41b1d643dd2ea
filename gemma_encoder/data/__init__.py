"""Where records come from. The only place that knows seqio and TensorFlow; importing it imports neither."""

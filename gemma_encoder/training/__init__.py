"""Fine-tuning: losses, optimiser, sharding, the compiled step, checkpoints, and the loop."""

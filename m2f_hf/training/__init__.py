"""Fine-tuning: checkpoints to resume from, optimizer groups and schedules."""

"""Everything that knows DeepSpeed: launch, set-up, the self-generated-token pass, the step, checkpoints, export."""

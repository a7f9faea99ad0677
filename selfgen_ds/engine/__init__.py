"""DeepSpeed: its JSON, the engine around the model, and one optimizer step."""

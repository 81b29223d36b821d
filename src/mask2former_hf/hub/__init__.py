"""The Hugging Face Hub and Auto classes: registration, pipeline, model cards, publishing, code with a checkpoint."""

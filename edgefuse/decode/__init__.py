"""From logits to words."""

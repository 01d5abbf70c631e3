"""What happens in a training step: the seam between SAELens's trainer and an auxiliary loss."""

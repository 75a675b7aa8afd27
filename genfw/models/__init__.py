"""The registered latent-variable models."""

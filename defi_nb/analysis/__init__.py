"What features and latent actions hold."

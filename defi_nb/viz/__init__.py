"Looking inside: attention and denoising."

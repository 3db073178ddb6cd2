"A policy at work, and what its number is worth."

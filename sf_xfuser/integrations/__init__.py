"""Where Torus Attention enters other packages: xDiT, diffusers and yunchang."""

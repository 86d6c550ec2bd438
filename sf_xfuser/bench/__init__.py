"""A/B measurements of attention calls and denoising steps: variants that alternate inside one process group."""

"""A/B measurements of attention calls and denoising steps: arms that alternate inside one process group."""

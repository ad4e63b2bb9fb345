"""Pure tensor maths: factors, small solves, spectra and seeded generators."""

"""One file per model family: everything that differs between SD, SDXL, SD3 and FLUX."""

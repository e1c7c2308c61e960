"""Drawing images: prompt lines, samplers, guidance, the engine, and samples during training."""

"""How quantization is done: numerics, observers, graph (where), modules (what holds the state), calibration, ptq."""

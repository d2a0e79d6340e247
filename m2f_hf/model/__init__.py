"""The network: configuration, backbone, pixel decoder, transformer decoder and heads, as in the paper's figure 2."""

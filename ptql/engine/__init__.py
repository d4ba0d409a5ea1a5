"""How a learning step is computed: in pieces that never wait for the device, on a GPU as CUDA graphs."""

"""What every layer above may use: devices, memory, ranks and checks of arguments."""

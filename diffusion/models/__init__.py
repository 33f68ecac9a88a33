"""The UNet: its configuration, its blocks, and a check for alterations."""

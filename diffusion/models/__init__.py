"""The UNet: its configuration, its blocks, and what was altered in one."""

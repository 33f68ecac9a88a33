from setuptools import setup

setup(
    packages=[
        "diffusion",
        "diffusion.importers",
        "diffusion.kernels",
        "diffusion.kernels.attention",
        "diffusion.kernels.group_norm_silu",
        "diffusion.kernels.philox",
        "diffusion.kernels.reverse_step",
    ],
    package_dir={"diffusion": "diffusion", "diffusion.kernels": "kernels"},
)

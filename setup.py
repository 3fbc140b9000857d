"""The passes over the weights in C++, built where a compiler is at hand; without them steps are taken in operations of torch."""

from setuptools import Extension, setup

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ftree-loop-vectorize", "-ffp-contract=fast", "-fopenmp"]
passes = Extension(
    "hyperopt.body._passes", ["hyperopt/body/passes.cpp"], extra_compile_args=FLAGS, extra_link_args=["-fopenmp"], optional=True
)
setup(ext_modules=[passes])

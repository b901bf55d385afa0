"""How the sources are compiled. Imports nothing: setup.py reads it before anything is installed."""

CXX = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math")  # neither flag changes a value
NVRTC = ("-std=c++17",)

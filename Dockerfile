# The benchmark suites: Safety-Gymnasium, Bullet-Safety-Gym, MetaDrive and DSRL, whose pins pip cannot
# resolve together, on the one Python that all of them support. docs/install.md says how to use it.
FROM python:3.11-slim

# pybullet is compiled; MuJoCo renders by EGL or OSMesa; MetaDrive and OpenCV need libGL and GLib.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential libegl1 libgl1 libglib2.0-0 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*
ENV MUJOCO_GL=egl OMP_NUM_THREADS=1 PIP_NO_CACHE_DIR=1

WORKDIR /opt/safeshield
COPY . .
RUN pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
CMD ["safeshield", "doctor", "core", "navigation", "velocity", "bullet", "dsrl", "metadrive"]

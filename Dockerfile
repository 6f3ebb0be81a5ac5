# Side-Step for NVIDIA GPUs. Songs, tensors and runs lie in /data, what comes from Hugging Face in /models:
#
#   docker build -t side-step .
#   docker run --rm --gpus all --shm-size 2g -v "$PWD:/data" -v side-step-models:/models side-step doctor
#
# With your own files in /data add --user "$(id -u):$(id -g)".
FROM debian:bookworm-slim

# A C compiler and Python's headers are for Triton, which compiles the blocks of the model.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir uv \
    && ln -s /opt/uv/bin/uv /usr/local/bin/uv
# Whoever --user names has no home of their own, and writes to these.
RUN useradd --create-home side-step \
    && mkdir /side-step /data /models \
    && chown side-step /side-step \
    && chmod 1777 /data /models /home/side-step

USER side-step
ENV HOME=/home/side-step USER=side-step HF_HOME=/models PYTHONUNBUFFERED=1 SIDESTEP_START=side-step
WORKDIR /side-step
COPY --chown=side-step pyproject.toml uv.lock ./
RUN UV_PYTHON_DOWNLOADS=never uv sync --no-dev --no-cache
COPY --chown=side-step . .

WORKDIR /data
VOLUME /models
ENTRYPOINT ["/side-step/.venv/bin/python", "/side-step/train.py"]
CMD ["--help"]

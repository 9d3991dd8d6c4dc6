# Both programs for a GPU machine. This file was not built or run: no registry was in reach.
#   docker build --tag mcm .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" --volume "$PWD:/work" mcm \
#       mcm-train pretrain pretrain/imagenette_vits16_clipb16 --cache cache --out runs/s16
# `--ipc=host`: the workers hand over batches in /dev/shm, of which a container has 64 MB by default.
FROM python:3.12-slim
# torch.compile needs a C compiler. The wheels of torch bring CUDA; the host brings the driver.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE masked_channel_modeling.py ./
COPY cache_tools ./cache_tools
COPY pipeline ./pipeline
COPY mcm ./mcm
COPY configs ./configs
RUN pip install --no-cache-dir .
# torch.compile and matplotlib keep files here, for any user.
ENV HOME=/tmp
USER 1000
WORKDIR /work
CMD ["mcm-train", "--help"]

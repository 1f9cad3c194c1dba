# One stage per vendor: docker build --target cpu|cuda|musa -t megatron-rb .
# The cuda and musa stages have not been built or run by this project's tests. Both keep the torch of their base image.
ARG CPU_IMAGE=python:3.11-slim
ARG CUDA_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3
# Needs Python 3.11 or newer; see Moore Threads' list of torch_musa images for one that fits the device and driver.
ARG MUSA_IMAGE=registry.mthreads.com/mcconline/musa-pytorch-release-public:latest

FROM ${CPU_IMAGE} AS cpu
WORKDIR /opt/megatron-rb
COPY . .
RUN pip install --no-cache-dir -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
 && pip install --no-cache-dir -c constraints.txt -e '.[dev,video]'
ENTRYPOINT ["rb"]

FROM ${CUDA_IMAGE} AS cuda
WORKDIR /opt/megatron-rb
COPY . .
# Transformer Engine, flash-attn and triton come with the image.
RUN pip install --no-cache-dir -e '.[video]'
ENTRYPOINT ["rb"]

FROM ${MUSA_IMAGE} AS musa
WORKDIR /opt/megatron-rb
COPY . .
# torch and torch_musa come with the image.
RUN pip install --no-cache-dir -e '.[video]'
ENTRYPOINT ["rb"]

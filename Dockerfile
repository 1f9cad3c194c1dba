# One stage per vendor: docker build --target cpu|cuda|musa -t megatron-rb .
# The cuda and musa stages have not been built or run by this project's tests. Both keep the torch of their base image.
ARG CPU_IMAGE=python:3.11-slim
ARG CUDA_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3
# Moore Threads' public image for S4000 (MP_22) with torch 2.9.1 and Python 3.10; there are others, name the one that fits
# device and driver. S80 and S3000 (MP_21) have no MCCL, which training needs.
ARG MUSA_IMAGE=registry.mthreads.com/mcconline/musa-pytorch-release-public:rc5.1.0-v2.9.1-S4000-py310

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
# Read by the container runtime on the host.
ENV MTHREADS_VISIBLE_DEVICES=all MTHREADS_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/megatron-rb
COPY . .
RUN python -c "import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and f'Python {v} is too old: give another MUSA_IMAGE')"
# torch is the vendor's patched build: it is pinned as found, so that pip cannot replace it.
RUN python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > /opt/vendor-torch.txt \
 && pip install --no-cache-dir -c /opt/vendor-torch.txt -e '.[video]'
ENTRYPOINT ["rb"]

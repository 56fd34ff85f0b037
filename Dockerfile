# The GPU image: NVIDIA's PyTorch image, with our lock in a virtual environment over its Python packages.
#
#   docker build -t nemo_prolong .
#   docker run --rm --init --gpus all --ipc=host --ulimit memlock=-1 --user "$(id -u):$(id -g)" \
#       -v /data:/workspace/nemo_prolong/data -v /runs:/workspace/nemo_prolong/runs \
#       nemo_prolong torchrun --nproc-per-node 8 scripts/train.py +exp=sft
#
# The base brings CUDA, NCCL, torch, Transformer Engine and apex. What it must bring stands in
# nemo_prolong/config/tested_versions.py, which docker/smoke.py checks. The digest is that of the index of both platforms.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.11-py3@sha256:417cbf33f87b5378849df37983552cd1f8bc8b62fe1ceabe004de816a55dff21
FROM ${BASE_IMAGE}

ARG USER_ID=10001
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nemo_prolong" \
      org.opencontainers.image.description="The ProLong long-context training recipe on NVIDIA NeMo and Megatron-core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
USER 0
# PYTHONPATH and the constraints of the base would bring back its own packages, or refuse ours. Megatron compiles a helper
# when it is imported. Where no GPU is there, as in a build, that asks for the list of GPUs.
ENV PYTHONPATH="" \
    PIP_CONSTRAINT="" \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    TORCH_CUDA_ARCH_LIST=9.0

# One home for every cache, writable for any uid, so that a volume can keep them and `--user`, pyxis and Kubernetes can
# run the image as someone else. A uid without an entry in /etc/passwd has no name, and torch asks for one when it is
# imported: USER gives it. Hydra shows the short form of an error; the scripts print ours.
# hadolint ignore=DL3064
ENV USER=prolong \
    LOGNAME=prolong \
    HOME=/home/prolong \
    XDG_CACHE_HOME=/home/prolong/.cache \
    HF_HOME=/home/prolong/.cache/huggingface \
    MPLCONFIGDIR=/home/prolong/.cache/matplotlib \
    NEMO_CACHE_DIR=/home/prolong/.cache/nemo_core \
    NEMO_HOME=/home/prolong/.cache/nemo \
    NEMORUN_HOME=/home/prolong/.cache/nemo_run \
    TORCH_EXTENSIONS_DIR=/home/prolong/.cache/torch_extensions \
    TORCHINDUCTOR_CACHE_DIR=/home/prolong/.cache/torchinductor \
    TRITON_CACHE_DIR=/home/prolong/.cache/triton \
    HYDRA_FULL_ERROR=0 \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false
RUN useradd --no-log-init --create-home --home-dir "$HOME" --uid "${USER_ID}" --shell /bin/bash prolong \
    && chmod 0777 "$HOME"
WORKDIR /workspace/nemo_prolong

# An environment of its own, because pip cannot replace packages that the base has from Debian. It takes pip, torch and
# Transformer Engine from the base. What is in both it takes from the lock.
ENV VIRTUAL_ENV=/opt/nemo_prolong
RUN python -m venv --system-site-packages --without-pip "$VIRTUAL_ENV"
ENV PATH=${VIRTUAL_ENV}/bin:${PATH}

# The lock before the sources: a change of them does not install it again.
COPY requirements requirements
RUN python -m pip install --no-deps --ignore-installed --require-hashes \
        -r requirements/gpu-py312.lock -r requirements/image.lock

# Our cuDNN before the base's, for everything that asks the loader. It reads these files in the order of their names.
RUN python -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/nvidia/cudnn/lib")' \
        > /etc/ld.so.conf.d/000-nemo_prolong-cudnn.conf \
    && ldconfig

COPY . .
RUN python -m pip install --no-deps --no-build-isolation -e . \
    && install -m 755 docker/torchrun "$VIRTUAL_ENV/bin/torchrun" \
    && test -x /opt/nvidia/nvidia_entrypoint.sh \
    && mkdir -p runs data \
    && chmod 0777 runs data docs/verification

# By number, so that Kubernetes can see that it is not root.
USER ${USER_ID}
# As an unprivileged user. What it leaves in the caches is everyone's.
RUN python docker/smoke.py --lock requirements/gpu-py312.lock --image \
    && chmod -R a+rwX "$HOME"

# NVIDIA's entrypoint sets up the libraries for older drivers. Ours asks the doctor, then becomes the command.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "/workspace/nemo_prolong/docker/entrypoint.sh"]
CMD ["bash"]

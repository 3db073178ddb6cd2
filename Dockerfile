# docker build -t defi_nb . && docker run --rm -it defi_nb
# --build-arg TORCH_FLAGS="--index-url ..." chooses another build of torch, such as the much smaller one for CPUs
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make libegl1 libegl-mesa0 libgl1-mesa-dri \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /defi_nb
COPY . .
ARG TORCH_FLAGS=""
RUN make install TORCH_FLAGS="$TORCH_FLAGS"
ENV PATH="/defi_nb/.venv/bin:$PATH"
CMD ["bash", "-c", "defi-nb list && exec bash"]

#!/bin/sh
# Base images for the container tests on a machine that reaches Debian's packages but no image registry.
# Needs root, debootstrap and a Docker engine; prints the settings that tests/deploy/test_docker.py reads.
#
#     eval "$(tests/deploy/local-images.sh FOLDER [WHEELS])"
#
# FOLDER is scratch space, WHEELS a folder of wheels that the package index does not offer (torch's CPU build).
set -eu
folder=$1
wheels=${2:-}
work="$folder/root"

{
    [ -x "$work/usr/bin/python3" ] ||
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work"
    # Installing needs this machine's certificates, its name servers and the extra wheels.
    cp /etc/ssl/certs/ca-certificates.crt "$work/etc/ssl/certs/ca-certificates.crt"
    cp /etc/resolv.conf "$work/etc/resolv.conf"
    if [ -n "$wheels" ]; then mkdir -p "$work/wheels" && cp "$wheels"/torch-*.whl "$work/wheels/"; fi
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = /wheels\n' > "$folder/pip.conf"
    tar -C "$work" -c . | docker import - neuronguard-test/build:bookworm

    # Running does not: about as small as the official slim image.
    tar -C "$work" -c --exclude=./wheels --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' \
        --exclude='./usr/share/locale/*' --exclude='./usr/share/python-wheels' --exclude='./var/cache/apt/*' \
        --exclude='./var/lib/apt/lists/*' --exclude='./var/log/*' --exclude='./var/cache/debconf/*' \
        --exclude='./usr/lib/python3*/ensurepip' . | docker import - neuronguard-test/python:bookworm

    # Stand-ins for the official images, from Debian's packages.
    for name in prometheus alertmanager; do
        package=prometheus
        [ "$name" = prometheus ] || package=prometheus-alertmanager
        docker rm --force neuronguard-test-make 2> /dev/null || true
        docker run --network host --name neuronguard-test-make neuronguard-test/build:bookworm sh -euc "
            apt-get update && apt-get install --yes --no-install-recommends $package wget &&
            install -d -o nobody -g nogroup /$name"
        docker commit --change "ENTRYPOINT [\"/usr/bin/$package\"]" --change 'USER nobody' --change 'CMD []' \
            neuronguard-test-make "neuronguard-test/$name:bookworm"
        docker rm neuronguard-test-make
    done
} >&2

echo "export NEURONGUARD_TEST_BUILD_ARGS='PYTHON_IMAGE=neuronguard-test/python:bookworm BUILD_IMAGE=neuronguard-test/build:bookworm'"
echo "export NEURONGUARD_TEST_BUILD_FLAGS='--network host --secret id=pip_conf,src=$folder/pip.conf'"
echo "export PROMETHEUS_IMAGE=neuronguard-test/prometheus:bookworm"
echo "export ALERTMANAGER_IMAGE=neuronguard-test/alertmanager:bookworm"

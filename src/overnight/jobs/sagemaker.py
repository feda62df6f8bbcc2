"""A run as a request for a SageMaker training job.

The file is what `aws sagemaker create-training-job --cli-input-yaml` reads. The script that the container
runs stands in it as well, in variables of the environment, since an argument has at most 256 characters and
no line break, and a variable 512.
"""

from __future__ import annotations

from overnight.config import nearest
from overnight.jobs.request import WAIT_FOR_IT, JobRequest, block, define_is_finished, join, quote, yaml_text
from overnight.preparation.prepare_commands import JobText

SAVE_SECONDS = 100  # SageMaker kills 120 seconds after SIGTERM
LONGEST_ARGUMENT, MOST_ARGUMENTS, LONGEST_VARIABLE = 256, 100, 512
LONGEST_HOURS = 28 * 24

# GPU and how many -> instance, by AWS's tables of accelerated instances.
INSTANCES = {
    "A10G": {1: "ml.g5.8xlarge", 4: "ml.g5.12xlarge", 8: "ml.g5.48xlarge"},
    "A100": {8: "ml.p4d.24xlarge"},
    "A100-80GB": {8: "ml.p4de.24xlarge"},
    "B200": {8: "ml.p6-b200.48xlarge"},
    "H100": {1: "ml.p5.4xlarge", 8: "ml.p5.48xlarge"},
    "H200": {8: "ml.p5en.48xlarge"},
    "L4": {1: "ml.g6.8xlarge", 4: "ml.g6.12xlarge", 8: "ml.g6.48xlarge"},
    "L40S": {1: "ml.g6e.8xlarge", 4: "ml.g6e.12xlarge", 8: "ml.g6e.48xlarge"},
    "V100": {1: "ml.p3.2xlarge", 4: "ml.p3.8xlarge", 8: "ml.p3.16xlarge"},
}
WITHOUT_GPU = "ml.c7i.8xlarge"


def write_sagemaker_job(request: JobRequest) -> str:
    """The request as YAML. Raises ValueError for what SageMaker has no instance or no room for."""
    if request.hours > LONGEST_HOURS:
        raise ValueError(f"hours={request.hours:g}: a SageMaker job has at most {LONGEST_HOURS}")
    parts = [_head(request), _container(request), _environment(request), _channels(request)]
    return "\n".join([*parts, _machines(request), _outputs(request)])


def sagemaker_submit_command(request: JobRequest) -> str:
    """What hands the file to SageMaker, after the text; a job's name can't be used twice."""
    uploads = [
        f"{join(('aws', 's3', 'sync', text.folder, _address(request, text.folder)))} && "
        for text in request.texts
        if not text.is_remote
    ]
    create = join(("aws", "sagemaker", "create-training-job", "--cli-input-yaml", f"file://{request.path}"))
    return f'{"".join(uploads)}{create} --training-job-name "{request.name}-$(date +%Y%m%d-%H%M%S)"'


def find_instance(gpu: str, gpus: int) -> str:
    """The instance with so many of that GPU. Raises ValueError with those there are."""
    if gpus == 0:
        return WITHOUT_GPU
    kinds = INSTANCES.get(gpu.upper())
    if kinds is None:
        raise ValueError(f"gpu={gpu} is of no SageMaker instance that is known{nearest(gpu, INSTANCES)}")
    if gpus not in kinds:
        raise ValueError(
            f"gpus_per_node={gpus}: SageMaker has instances with {' or '.join(map(str, kinds))} {gpu.upper()}"
        )
    return kinds[gpus]


def _address(request: JobRequest, path: str) -> str:
    bucket = (request.bucket or "YOUR-BUCKET").removeprefix("s3://").rstrip("/")
    return f"s3://{bucket}/{path.strip('/')}"


def _head(request: JobRequest) -> str:
    role = request.role or "arn:aws:iam::123456789012:role/YOUR-ROLE"
    return f"""\
# {request.run} as a SageMaker training job: {request.size}, on spot machines.
# Written by: {request.made_by}
#
# Version 2 of AWS's command reads it. When a machine is taken away SageMaker finds another, and the run goes
# on from its last checkpoint; so does a second job that is given the same checkpoints.

TrainingJobName: {request.name}
RoleArn: {yaml_text(role)}
"""


def _container(request: JobRequest) -> str:
    words = [yaml_text(_check_argument(word)) for word in request.words]
    if len(words) > MOST_ARGUMENTS:
        raise ValueError(
            f"SageMaker passes on {MOST_ARGUMENTS} words, and the run has {len(words)} of options: "
            "put them into a recipe that the image has"
        )
    listed = "\n".join(f"    - {word}" for word in words)
    return f"""\
AlgorithmSpecification:
  # Has overnight installed: FROM pytorch/pytorch, COPY a checkout, RUN pip install it, pushed to your ECR.
  TrainingImage: {yaml_text(request.image or "YOUR-IMAGE")}
  TrainingInputMode: File
  # The scripts stand under Environment.
  ContainerEntrypoint:
    - bash
    - -c
    - for part in HOSTS TRAIN START WAIT FINISH; do script=OVERNIGHT_$part; eval "${{!script}}"; done
    - overnight
  # The recipe and its options, as `overnight train` takes them.
  ContainerArguments:
{listed}
"""


def _check_argument(word: str) -> str:
    if len(word) > LONGEST_ARGUMENT or "\n" in word:
        raise ValueError(
            f"{word[:40]!r} does not fit into a SageMaker job: an option has at most {LONGEST_ARGUMENT} "
            "characters there, and no line break; put it into a recipe that the image has"
        )
    return word


def _environment(request: JobRequest) -> str:
    train, start = _train_script(request), _start_script(request)
    wait = define_is_finished('"runs/$OVERNIGHT_NAME"') + WAIT_FOR_IT
    scripts = {"HOSTS": HOSTS, "TRAIN": train, "START": start, "WAIT": wait, "FINISH": FINISH}
    told = ""
    for name, script in scripts.items():
        if len(script) > LONGEST_VARIABLE:
            raise ValueError(
                f"sources: {len(request.texts)} texts do not fit into a SageMaker job: mix fewer, or prepare "
                "them together"
            )
        told += f"  OVERNIGHT_{name}: |\n{block(script, 4)}\n"
    return f"""\
Environment:
  # So many seconds a process has for saving, before torchrun kills it; SageMaker waits for 120.
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT: "{SAVE_SECONDS}"
  # Processes that torchrun begins anew meet anew (pytorch's issue 135712).
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE: "1"
  OVERNIGHT_NAME: {yaml_text(request.run_name)}
{told}"""


HOSTS = """\
# Images with SageMaker's toolkit have SM_ variables; all have this file.
host() { python3 -c "import json, os
told = json.load(open('/opt/ml/input/config/resourceconfig.json'))
print($1)"; }
export SM_CURRENT_HOST="${SM_CURRENT_HOST:-$(host "told['current_host']")}"
hosts=($(host "*sorted(json.loads(os.environ.get('SM_HOSTS') or json.dumps(told['hosts'])))"))
[ "$SM_CURRENT_HOST" = "${hosts[0]}" ] && first=1 || first=0
"""


def _train_script(request: JobRequest) -> str:
    """Where the text lies, and what every process does."""
    channels = [
        f'export {name}="${{{name}:-/opt/ml/input/data/{channel}}}"'
        for name, channel in ((_variable(channel), channel) for channel in _name_channels(request))
    ]
    data = _data_option(request)
    return "\n".join(
        [
            *channels,
            "# Every process begins the run, or goes on with it.",
            "train() {",
            '  if [ -f "runs/$OVERNIGHT_NAME/recipe.toml" ]; then',
            '    exec overnight train --resume "runs/$OVERNIGHT_NAME"',
            "  fi",
            f'  exec overnight train "$@"{f" {data}" if data else ""}',
            "}",
            "export -f train",
            "",
        ]
    )


def _start_script(request: JobRequest) -> str:
    """A torchrun, which keeps its rendezvous on the first host."""
    runs = '"${SM_CHANNEL_RUNS:-/opt/ml/input/data/runs}"' if request.nodes > 1 else "/opt/ml/checkpoints"
    processes, restarts = request.processes_per_node, request.max_restarts
    return f"""\
mkdir -p /opt/ml/work {runs}
cd /opt/ml/work && ln -sfn {runs} runs
torchrun \\
  --nnodes ${{#hosts[@]}} --nproc-per-node {processes} --max-restarts {restarts} \\
  --rdzv-backend c10d --rdzv-endpoint "${{hosts[0]}}:29500" \\
  --rdzv-conf is_host=$first --local-addr "$SM_CURRENT_HOST" \\
  --no-python bash -c 'train "$@"' train "$@" &
"""


FINISH = """\
if [ "$status$first" = 01 ]; then
  overnight convert "runs/$OVERNIGHT_NAME" --out "${SM_MODEL_DIR:-/opt/ml/model}/hf"
fi
exit "$status"
"""


def _name_channels(request: JobRequest) -> dict[str, JobText]:
    """Channel -> the text that it brings from the bucket."""
    texts = [text for text in request.texts if not text.is_remote]
    names = (
        ["training"] if len(request.texts) == 1 else [f"text{count}" for count in range(1, 1 + len(texts))]
    )
    return dict(zip(names, texts, strict=False))


def _variable(channel: str) -> str:
    """In which SageMaker's toolkit tells where a channel lies."""
    return f"SM_CHANNEL_{channel.upper()}"


def _data_option(request: JobRequest) -> str:
    """The option that names the text where it lies in the container."""
    places = {text: f'"${_variable(channel)}"' for channel, text in _name_channels(request).items()}
    if not places:
        return ""
    if all(text.weight is None for text in request.texts):
        return f"--data {' '.join(places.values())}"
    mixed = [f"{places.get(text) or quote(text.folder)}={text.weight}" for text in request.texts]
    return f"--mixture {' '.join(mixed)}"


def _channels(request: JobRequest) -> str:
    parts = [
        f"""\
  - ChannelName: {channel}
    DataSource:
      S3DataSource:
        S3DataType: S3Prefix
        S3Uri: {yaml_text(_address(request, text.folder) + "/")}
        S3DataDistributionType: FullyReplicated
"""
        for channel, text in _name_channels(request).items()
    ]
    if request.nodes > 1:
        parts.append(f"""\
  # Several hosts write into one checkpoint, so runs/ is on a disk that all of them see.
  - ChannelName: runs
    DataSource:
      FileSystemDataSource:
        FileSystemType: FSxLustre
        FileSystemId: {yaml_text(request.shared_disk or "YOUR-FILE-SYSTEM")}
        FileSystemAccessMode: rw
        # Its mount name, and a folder that is there.
        DirectoryPath: /fsx/runs
""")
    if not parts:
        return ""
    return f"# Each lies in /opt/ml/input/data, named by SM_CHANNEL_.\nInputDataConfig:\n{''.join(parts)}"


def _machines(request: JobRequest) -> str:
    network = """\
# Where the file system is.
VpcConfig:
  SecurityGroupIds: [YOUR-SECURITY-GROUP]
  Subnets: [YOUR-SUBNET]
"""
    seconds = round(request.hours * 3600)
    return f"""\
ResourceConfig:
  InstanceType: {find_instance(request.gpu or "H100", request.gpus_per_node)}
  InstanceCount: {request.nodes}
  VolumeSizeInGB: 500
{network if request.nodes > 1 else ""}\
EnableManagedSpotTraining: true
StoppingCondition:
  MaxRuntimeInSeconds: {seconds}
  # With the time spent waiting for machines.
  MaxWaitTimeInSeconds: {seconds + 86400}
RetryStrategy:
  MaximumRetryAttempts: 3
"""


def _outputs(request: JobRequest) -> str:
    checkpoints = f"""\
# What is in the folder is copied to the bucket as it is written, and back into another machine.
CheckpointConfig:
  LocalPath: /opt/ml/checkpoints
  S3Uri: {yaml_text(_address(request, "runs") + "/")}
"""
    return f"""\
{checkpoints if request.nodes == 1 else ""}\
# /opt/ml/model, the finished model for Transformers, as model.tar.gz.
OutputDataConfig:
  S3OutputPath: {yaml_text(_address(request, "models") + "/")}
"""

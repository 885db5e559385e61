#!/bin/bash
# A study on a Slurm cluster, by Ray inside one job. Fit the #SBATCH lines to your cluster, then, in the project's folder:
#
#     sbatch scripts/slurm.sh --config cluster.yaml --device cuda
#
# Arguments are main.py's. When the job's time is over, submit it again, without --fresh: finished cells are kept.
#SBATCH --job-name=study
#SBATCH --nodes=4 --ntasks-per-node=1 --exclusive
#SBATCH --cpus-per-task=32 --gpus-per-node=4 --mem=0
#SBATCH --time=24:00:00 --signal=B:TERM@300

set -eu
cd "$SLURM_SUBMIT_DIR"
source "${VIRTUAL_ENV:-.venv}/bin/activate"
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since 22.05 srun takes no --cpus-per-task from sbatch: one CPU a step
export RAY_worker_niceness=0 # Ray would run cells at 15, behind everything else
export RAY_AUTH_MODE=token # nobody else on these nodes can use this Ray
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # where this script runs
ip=$(getent ahostsv4 "$head" | awk '!/^127\./ { print $1; exit }') # its own name may mean itself alone
ip=${HEAD_IP:-${ip:-$(hostname -I | cut -d " " -f 1)}}
address=$ip:$((20000 + SLURM_JOB_ID % 20000))
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
others=$((SLURM_JOB_NUM_NODES - 1))

srun --nodes=1 --ntasks=1 -w "$head" \
    ray start --head --node-ip-address="$ip" --port="${address#*:}" --include-dashboard=false "${resources[@]}" --block &
if ((others)); then
    sleep 10 # until the head listens; those that come too early try again for a minute
    srun --nodes="$others" --ntasks="$others" --exclude="$head" \
        ray start --address="$address" "${resources[@]}" --block &
fi

count='import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))'
errors=$(mktemp)
for attempt in {1..30}; do
    nodes=$(python -c "$count" "$address" 2> "$errors" || echo 0)
    ((nodes == SLURM_JOB_NUM_NODES)) && break
    if ((attempt == 30)); then
        tail -n 1 "$errors" >&2
        echo "error: $nodes of $SLURM_JOB_NUM_NODES nodes have joined Ray at $address (HEAD_IP sets another address)" >&2
        exit 1
    fi
    sleep 5
done

if ((${SLURM_RESTART_COUNT:-0})); then # Slurm has requeued the job: what it has computed before must not be cleared
    for argument; do
        shift
        case $argument in
            --f | --fr | --fre | --fres | --fresh) # main.py takes them all
                echo "the job was requeued: it goes on with what is finished, without $argument" >&2 ;;
            *) set -- "$@" "$argument" ;;
        esac
    done
fi

study=''
trap '[[ -z $study ]] || kill -TERM "$study"' TERM # five minutes before the end: it stops cleanly
# a job before this one that was killed holds the results folder for three minutes; once it has begun, it is run once
python main.py --phase all --wait 200 "$@" --set run.executor=ray run.address="$address" &
study=$!
status=0
wait "$study" || status=$?
if kill -0 "$study" 2> /dev/null; then # the signal has ended the wait
    status=0
    wait "$study" || status=$?
fi
exit "$status"

#!/bin/sh
# Tells a Prefect server of the work pool, the limits and the deployments. It may run again at any time: the pool's template
# and the deployments become those of this version, limits that are there keep what was set by hand.
#
#   CHANNEL_MERGING_WORK_POOL   process (default), docker or kubernetes: where runs live
#   CHANNEL_MERGING_IMAGE       the image of runs, of pools that start containers; without it the template's
set -eu
cd "$(dirname "$0")/.."
kind=${CHANNEL_MERGING_WORK_POOL:-process}
template=infra/work-pools/$kind.json
if [ -n "${CHANNEL_MERGING_IMAGE:-}" ] && [ "$kind" != process ]; then
    named=$(mktemp)
    trap 'rm -f "$named"' EXIT
    python -c 'import json, sys
template = json.load(open(sys.argv[1]))
template["variables"]["properties"]["image"]["default"] = sys.argv[2]
json.dump(template, sys.stdout)' "$template" "$CHANNEL_MERGING_IMAGE" > "$named"
    template=$named
fi
prefect work-pool create channel-merging --type "$kind" --base-job-template "$template" --overwrite
# an existing pool keeps its type, whatever is asked for
prefect work-pool inspect channel-merging --output json | python -c 'import json, sys
if (found := json.load(sys.stdin)["type"]) != sys.argv[1]:
    sys.exit(f"work pool channel-merging: expected type {sys.argv[1]}, found {found}. Delete it (its deployments are made again): "
             "prefect work-pool delete channel-merging")' "$kind"
# one run at a time on a shared cluster, and four downloads at once over all runs
prefect gcl inspect merge-cluster > /dev/null 2>&1 || prefect gcl create merge-cluster --limit 1
prefect gcl inspect download > /dev/null 2>&1 || prefect gcl create download --limit 4
prefect --no-prompt deploy --all

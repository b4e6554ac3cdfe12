# Bash completion for flowd-rs(8).

_flowd_rs()
{
	local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} words= command= sub= i
	for ((i = 1; i < COMP_CWORD; i++)); do
		case ${COMP_WORDS[i]} in
		# Skip the option's value.
		-c | --config | -D | --define | --socket | --pipe | --bpf-fs-path | --log-level | --sort | --target-interface | --user | --address | \
			--port | --experiment | --limit | -o | --output | -f | --filter | --where | -H | --head | --from | --to | --sum-by | --top) ((i++)) ;;
		-*) ;;
		*)
			if [ -z "$command" ]; then
				command=${COMP_WORDS[i]}
			elif [ -z "$sub" ]; then
				sub=${COMP_WORDS[i]}
			fi
			;;
		esac
	done
	case $before in
	-c | --config | --socket | --pipe | --bpf-fs-path | -o | --output | -f | --filter)
		compopt -o filenames 2>/dev/null
		COMPREPLY=($(compgen -f -- "$word"))
		return
		;;
	--log-level)
		COMPREPLY=($(compgen -W "error warn info debug trace" -- "$word"))
		return
		;;
	--sort)
		COMPREPLY=($(compgen -W "age experiment source destination" -- "$word"))
		return
		;;
	--sum-by)
		COMPREPLY=($(compgen -W "src dst src_port dst_port src_as dst_as in_if out_if proto exporter tag experiment activity label" -- "$word"))
		return
		;;
	--target-interface)
		COMPREPLY=($(compgen -W "$(ls /sys/class/net 2>/dev/null)" -- "$word"))
		return
		;;
	esac
	case $command in
	"") words="run collect config exporters filter flows listen marker prepare reader registry send status stun tag version help --log-level --log-time --version --help" ;;
	run) words="--config --debug --fg --log-level --log-time" ;;
	collect) words="--config --define --debug --log-level --log-time" ;;
	exporters | filter) words="--config --socket --json" ;;
	config)
		case $sub in
		"") words="check convert schema show" ;;
		schema) words="--collector" ;;
		*) words="--config --collector --define" ;;
		esac
		;;
	flows)
		words="--config --socket --experiment --address"
		[ "$sub" = end ] && words+=" --dry-run --yes" || words="end $words --sort --limit --json --watch"
		;;
	listen) words="--address --port --json" ;;
	marker) [ "$sub" = clean ] && words="--target-interface --remove-qdisc" || words="show clean --bpf-fs-path" ;;
	prepare) words="--config --user" ;;
	reader)
		compopt -o filenames 2>/dev/null
		words="--verbose --csv --json --quiet --utc --head --from --to --where --filter --sum-by --top --output --legacy --debug"
		[[ $word == -* ]] || words="$(compgen -f -- "$word")"
		;;
	registry) words="list update lookup --config" ;;
	send) words="start end --config --pipe" ;;
	status) words="--config --socket --collector --json" ;;
	stun) [ -n "$sub" ] && words="--config" || words="sample" ;;
	tag) [ "$sub" = decode ] && words="--scitag" || words="encode decode" ;;
	esac
	COMPREPLY=($(compgen -W "$words" -- "$word"))
}

complete -F _flowd_rs flowd-rs

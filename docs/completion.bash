# Completion of flags and their values in bash, for `python SCRIPT.py ...`:   source docs/completion.bash
# A script writes its own completion, by tyro, when <TAB> is first pressed behind its name.
_cleanirl() {
  local i own
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; i++)); do
    [[ ${COMP_WORDS[i]} == *.py ]] && break
  done
  grep -qs 'command_line.begin' -- "${COMP_WORDS[i]}" || return 0
  own=_tyro_$(basename "${COMP_WORDS[i]}" | tr -c '[:alnum:]_\n' _)
  declare -F "$own" > /dev/null || source <("${COMP_WORDS[0]}" "${COMP_WORDS[i]}" --tyro-write-completion bash -)
  COMP_WORDS=("$(basename "${COMP_WORDS[i]}")" "${COMP_WORDS[@]:i + 1}")
  COMP_CWORD=$((COMP_CWORD - i))
  "$own"
}
complete -o default -F _cleanirl python python3

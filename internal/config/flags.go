package config

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/alecthomas/kong"
)

// Grammar returns a pointer to a struct that makes kong read all keys as flags;
// after parsing, Flags reads it back. Flags carry text only: bounds are checked
// by Load, which treats all sources alike. The flags --config-file (with a file)
// and --print-config come on top.
func (s *Set) Grammar(file bool) any {
	fields := make([]reflect.StructField, 0, len(s.keys)+2)
	add := func(name string, typ reflect.Type, tag string) {
		fields = append(fields, reflect.StructField{
			Name: fmt.Sprintf("F%d", len(fields)),
			Type: typ,
			Tag:  reflect.StructTag(fmt.Sprintf(`name:%q %s`, name, tag)),
		})
	}
	text, boolean := reflect.TypeFor[*string](), reflect.TypeFor[*bool]()
	for _, k := range s.keys {
		// Kong must not look for variables in braces in the text of a default.
		help := strings.ReplaceAll(k.help, "$", "$$") + " ($$" + k.envs[0] + ")"
		if k.flagy {
			add(k.Flag(), boolean, fmt.Sprintf(`help:%q negatable:""`, help))
			continue
		}
		holder := k.def
		if holder == "" {
			holder = "TEXT"
		}
		add(k.Flag(), text, fmt.Sprintf(`help:%q placeholder:%q`, help, holder))
	}
	if file {
		add("config-file", text, `help:"YAML file with these settings. ($$CONFIG_FILE)" placeholder:"config.yaml"`)
	}
	add("print-config", boolean, `help:"Print the settings in force, as YAML with their sources, and exit."`)
	return reflect.New(reflect.StructOf(fields)).Interface()
}

// Flags returns the flags that were given to a parsed Grammar, and whether
// --print-config was among them.
func Flags(grammar any) (o Options, printConfig bool) {
	o.Flags = map[string]string{}
	v := reflect.ValueOf(grammar).Elem()
	for i := range v.NumField() {
		field := v.Field(i)
		if field.IsNil() {
			continue
		}
		name := v.Type().Field(i).Tag.Get("name")
		switch {
		case name == "print-config":
			printConfig = field.Elem().Bool()
		case name == "config-file":
			o.File = field.Elem().String()
		case field.Elem().Kind() == reflect.Bool:
			o.Flags[name] = strconv.FormatBool(field.Elem().Bool())
		default:
			o.Flags[name] = field.Elem().String()
		}
	}
	return o, printConfig
}

// Command is the kong option that adds a command with the flags of s.
func Command(name, help string, grammar any, tags ...string) kong.Option {
	return kong.DynamicCommand(name, help, "", grammar, tags...)
}

// Package cmdline reads the command lines of tools, which kong describes.
package cmdline

import (
	"io"

	"github.com/alecthomas/kong"
)

// Parse reads args into g, a pointer to a struct with kong's tags. helped tells that --help has been printed: then there
// is nothing else to do, and parsed is nil.
func Parse(g any, args []string, out, errOut io.Writer, options ...kong.Option) (parsed *kong.Context, helped bool, err error) {
	type exit struct{} // kong ends the process after its help, in the middle of reading
	defer func() {
		switch v := recover().(type) {
		case nil:
		case exit:
			parsed, helped, err = nil, true, nil
		default:
			panic(v)
		}
	}()
	options = append(options, kong.Writers(out, errOut), kong.Exit(func(int) { panic(exit{}) }))
	parser, err := kong.New(g, options...)
	if err != nil {
		return nil, false, err
	}
	parsed, err = parser.Parse(args)
	return parsed, false, err
}

package pushctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/push-manager/push-manager/internal/pause"
	pubsub "github.com/push-manager/push-manager/proto"
)

type jobsCmd struct {
	Create jobCreateCmd `cmd:"" help:"Push one message to many users, at a speed."`
	Get    jobGetCmd    `cmd:"" help:"Show a job."`
	Ls     jobLsCmd     `cmd:"" help:"List the jobs."`
	Watch  jobWatchCmd  `cmd:"" help:"Show how a job gets on, until it has ended."`
	Pause  jobPauseCmd  `cmd:"" help:"Pause a job."`
	Resume jobResumeCmd `cmd:"" help:"Go on with a job that is paused."`
	Cancel jobCancelCmd `cmd:"" help:"End a job."`
	Rate   jobRateCmd   `cmd:"" help:"Change the speed of a job."`
	Delete jobDeleteCmd `cmd:"" help:"Forget a job that has ended."`
}

// jobFlags are the flags of every call about jobs.
type jobFlags struct {
	apiFlags

	Timeout time.Duration `default:"10s" help:"Longest time for the call."`
}

type jobCreateCmd struct {
	ID   string `arg:"" name:"job-id" help:"Names the job: 1 to 64 letters, digits, and . _ -. The same name with the same flags again is the same job."`
	Text string `arg:"" optional:"" help:"What to push."`

	Everybody bool     `help:"For everybody who is connected."`
	Room      []string `placeholder:"ROOM" sep:"none" help:"For the members of a room, may be repeated."`
	Users     string   `placeholder:"A,B" help:"For these users, separated by commas."`
	UsersFile string   `placeholder:"FILE" help:"For the users in a file, one a line; - for standard input."`
	Filter    []string `placeholder:"KEY=VALUE[,VALUE]" sep:"none" help:"Only for connections whose attribute KEY has one of the values; not for those with !KEY=VALUE. May be repeated: all must hold."`

	Rate           uint32            `required:"" placeholder:"N" help:"Users a second."`
	Start          string            `placeholder:"TIME" help:"When to begin: in RFC 3339, or a time from now such as 10m."`
	Deadline       string            `placeholder:"TIME" help:"When to end at the latest, in the same way. Default: seven days after the start."`
	MaxFailedRatio float64           `placeholder:"0.05" help:"Pause when more than this part has failed or is unknown."`
	Priority       string            `default:"" enum:",low,normal,high,critical" placeholder:"low" help:"low, normal, high or critical."`
	Type           string            `default:"text" help:"Type of the message: text, audio, video, translation, system or a number."`
	DataFile       string            `placeholder:"FILE" help:"Read the text from a file, - for standard input."`
	Metadata       map[string]string `placeholder:"KEY=VALUE" mapsep:"none" help:"Metadata of the message, may be repeated."`
	Watch          bool              `help:"Show how it gets on, until it has ended."`
	jobFlags
}

// oneJob is a command about a job that there is.
type oneJob struct {
	ID string `arg:"" name:"job-id" help:"The job."`
	jobFlags
}

type (
	jobGetCmd    struct{ oneJob }
	jobWatchCmd  struct{ oneJob }
	jobPauseCmd  struct{ oneJob }
	jobResumeCmd struct{ oneJob }
	jobCancelCmd struct{ oneJob }
	jobDeleteCmd struct{ oneJob }
	jobLsCmd     struct {
		NotEnded bool `help:"Only jobs that have not ended."`
		jobFlags
	}
	jobRateCmd struct {
		ID   string `arg:"" name:"job-id" help:"The job."`
		Rate uint32 `arg:"" help:"Users a second."`
		jobFlags
	}
)

// Run makes a job.
func (c *jobCreateCmd) Run(ctx context.Context, t *terminal) error {
	now := time.Now()
	if c.Text == "" && c.DataFile == "" && len(c.Metadata) == 0 {
		return &usageError{"nothing to push: give a text, --data-file or --metadata"}
	}
	content, err := (&messageFlags{Type: c.Type, DataFile: c.DataFile, Metadata: c.Metadata}).content(c.Text, t.in)
	if err != nil {
		return err
	}
	spec := &pubsub.BroadcastJobSpec{
		Everybody: c.Everybody, RoomIds: c.Room, Content: content, RatePerSecond: c.Rate, MaxFailedRatio: c.MaxFailedRatio,
	}
	if spec.UserIds, err = c.users(t.in); err != nil {
		return err
	}
	for _, text := range slices.Concat(spec.GetRoomIds(), spec.GetUserIds()) {
		if !utf8.ValidString(text) {
			return &usageError{"ids must be valid UTF-8"}
		}
	}
	if spec.StartTime, err = timeFlag("--start", c.Start, now); err != nil {
		return err
	}
	if spec.Deadline, err = timeFlag("--deadline", c.Deadline, now); err != nil {
		return err
	}
	if spec.Filter, err = matches(c.Filter); err != nil {
		return err
	}
	if c.Priority != "" {
		spec.Priority = pubsub.Priority(pubsub.Priority_value["PRIORITY_"+strings.ToUpper(c.Priority)])
	}
	if err := c.one(ctx, t, func(ctx context.Context, api pubsub.BroadcastJobServiceClient) (jobReply, error) {
		return api.CreateJob(ctx, &pubsub.CreateJobRequest{JobId: c.ID, Spec: spec})
	}); err != nil || !c.Watch {
		return err
	}
	return c.watch(ctx, t, c.ID)
}

// users reads the list of users.
func (c *jobCreateCmd) users(in io.Reader) (users []string, err error) {
	text := []byte(strings.ReplaceAll(c.Users, ",", "\n"))
	switch {
	case c.Users != "" && c.UsersFile != "":
		return nil, &usageError{"give --users or --users-file, not both"}
	case c.UsersFile == "-" && c.DataFile == "-":
		return nil, &usageError{"standard input can be read once"}
	case c.UsersFile == "-":
		text, err = io.ReadAll(io.LimitReader(in, maxData))
	case c.UsersFile != "":
		text, err = os.ReadFile(c.UsersFile)
	}
	if err != nil {
		return nil, fmt.Errorf("read the users: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" {
			users = append(users, line)
		}
	}
	return users, nil
}

// timeFlag reads a moment, or a time from now.
func timeFlag(flag, text string, now time.Time) (*timestamppb.Timestamp, error) {
	if text == "" {
		return nil, nil //nolint:nilnil // it is optional
	}
	if d, err := time.ParseDuration(text); err == nil {
		return timestamppb.New(now.Add(d)), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return nil, &usageError{fmt.Sprintf("%s: %q is neither a time such as 2026-12-24T18:00:00Z nor one from now such as 10m", flag, text)}
	}
	return timestamppb.New(at), nil
}

// Run shows a job.
func (c *jobGetCmd) Run(ctx context.Context, t *terminal) error {
	return c.one(ctx, t, func(ctx context.Context, api pubsub.BroadcastJobServiceClient) (jobReply, error) {
		return api.GetJob(ctx, &pubsub.GetJobRequest{JobId: c.ID})
	})
}

// Run pauses a job.
func (c *jobPauseCmd) Run(ctx context.Context, t *terminal) error {
	return c.one(ctx, t, func(ctx context.Context, api pubsub.BroadcastJobServiceClient) (jobReply, error) {
		return api.PauseJob(ctx, &pubsub.PauseJobRequest{JobId: c.ID})
	})
}

// Run goes on with a job.
func (c *jobResumeCmd) Run(ctx context.Context, t *terminal) error {
	return c.one(ctx, t, func(ctx context.Context, api pubsub.BroadcastJobServiceClient) (jobReply, error) {
		return api.ResumeJob(ctx, &pubsub.ResumeJobRequest{JobId: c.ID})
	})
}

// Run ends a job.
func (c *jobCancelCmd) Run(ctx context.Context, t *terminal) error {
	return c.one(ctx, t, func(ctx context.Context, api pubsub.BroadcastJobServiceClient) (jobReply, error) {
		return api.CancelJob(ctx, &pubsub.CancelJobRequest{JobId: c.ID})
	})
}

// Run forgets a job.
func (c *jobDeleteCmd) Run(ctx context.Context, t *terminal) error {
	deleted := func(j *pubsub.BroadcastJob) string {
		return fmt.Sprintf("job %s is deleted, it was %s", clean(j.GetJobId()), t.jobState(j))
	}
	return c.call(ctx, t, deleted, func(ctx context.Context, api pubsub.BroadcastJobServiceClient) (jobReply, error) {
		return api.DeleteJob(ctx, &pubsub.DeleteJobRequest{JobId: c.ID})
	})
}

// Run changes the speed of a job.
func (c *jobRateCmd) Run(ctx context.Context, t *terminal) error {
	return c.one(ctx, t, func(ctx context.Context, api pubsub.BroadcastJobServiceClient) (jobReply, error) {
		return api.SetJobRate(ctx, &pubsub.SetJobRateRequest{JobId: c.ID, RatePerSecond: c.Rate})
	})
}

// Run watches a job.
func (c *jobWatchCmd) Run(ctx context.Context, t *terminal) error { return c.watch(ctx, t, c.ID) }

// Run lists the jobs.
func (c *jobLsCmd) Run(ctx context.Context, t *terminal) error {
	conn, _, done, err := c.connect()
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	var jobs []*pubsub.BroadcastJob
	for token := ""; ; {
		page, err := pubsub.NewBroadcastJobServiceClient(conn).ListJobs(ctx, &pubsub.ListJobsRequest{PageSize: 1000, PageToken: token, NotEnded: c.NotEnded})
		if err != nil {
			return c.failure(err)
		}
		jobs = append(jobs, page.GetJobs()...)
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "JOB\tSTATE\tFOR\tRATE\tTARGETS\tDELIVERED\tOFFLINE\tFAILED\tUNKNOWN\tDONE IN\tCREATED")
	for _, j := range jobs {
		p := j.GetProgress()
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%d\t%s\t%d\t%d\t%d\t%d\t%s\t%s\n", clean(j.GetJobId()), j.GetState(), clean(j.GetTarget()), j.GetRatePerSecond(), targetsOf(p),
			p.GetDelivered(), p.GetOffline(), p.GetFailed(), p.GetUnknown(), etaOf(p), j.GetCreateTime().AsTime().Local().Format(time.DateTime))
	}
	_ = table.Flush() // into memory
	return t.tell(&pubsub.ListJobsResponse{Jobs: jobs}, strings.TrimRight(b.String(), "\n"))
}

// jobReply is what all replies about one job have in common.
type jobReply interface{ GetJob() *pubsub.BroadcastJob }

// one does a call about one job and prints the job.
func (f *jobFlags) one(ctx context.Context, t *terminal, do func(context.Context, pubsub.BroadcastJobServiceClient) (jobReply, error)) error {
	return f.call(ctx, t, t.jobText, do)
}

// call does a call about one job and prints what text says of the job.
func (f *jobFlags) call(ctx context.Context, t *terminal, text func(*pubsub.BroadcastJob) string, do func(context.Context, pubsub.BroadcastJobServiceClient) (jobReply, error)) error {
	if f.Timeout <= 0 || f.Timeout > maxTimeout {
		return &usageError{fmt.Sprintf("--timeout: %v must be above zero and at most %v", f.Timeout, maxTimeout)}
	}
	conn, _, done, err := f.connect()
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, f.Timeout)
	defer cancel()
	r, err := do(ctx, pubsub.NewBroadcastJobServiceClient(conn))
	if err != nil {
		return f.failure(err)
	}
	return t.tell(r.GetJob(), text(r.GetJob()))
}

// watch prints a job whenever it has changed. Its exit code is that of the worst outcome.
func (f *jobFlags) watch(ctx context.Context, t *terminal, id string) error {
	conn, _, done, err := f.connect()
	if err != nil {
		return err
	}
	defer done()
	var last *pubsub.BroadcastJob
	for { // an instance that ends sends its watchers to another one
		stream, err := pubsub.NewBroadcastJobServiceClient(conn).WatchJob(ctx, &pubsub.WatchJobRequest{JobId: id})
		for err == nil {
			var r *pubsub.WatchJobResponse
			if r, err = stream.Recv(); err == nil {
				last = r.GetJob()
				err = t.tell(last, t.jobLine(last))
			}
		}
		s, answered := status.FromError(err)
		switch {
		case errors.Is(err, io.EOF):
			return jobOutcome(last)
		case ctx.Err() != nil, s.Code() == codes.Canceled:
			return nil
		case !answered:
			return err
		case last == nil || s.Code() != codes.Unavailable:
			return f.failure(err)
		}
		if !pause.For(ctx, time.Second) {
			return nil
		}
	}
}

// jobOutcome is the exit code of a job that has ended.
func jobOutcome(j *pubsub.BroadcastJob) error {
	p := j.GetProgress()
	switch {
	case p.GetUnknown() > 0:
		return &outcome{code: exitUnknown}
	case p.GetFailed() > 0, len(p.GetNodeFailures()) > 0, j.GetState() != pubsub.JobState_SUCCEEDED:
		return &outcome{code: exitFailed}
	case p.GetDelivered() == 0:
		return &outcome{code: exitOffline}
	}
	return nil
}

// failure is an error of a call about jobs in a line. Such calls may all be repeated.
func (f *jobFlags) failure(err error) error {
	s := status.Convert(err)
	word := words(s.Code())
	if s.Code() == codes.NotFound {
		word = "not found"
	}
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return fmt.Errorf("%s: %s [%s]", word, clean(s.Message()), clean(info.GetReason()))
		}
	}
	if s.Code() == codes.Unimplemented {
		return fmt.Errorf("what answers at %s has no broadcast jobs: %s", clean(f.Address), clean(s.Message()))
	}
	return fmt.Errorf("%s from %s: %s", word, clean(f.Address), clean(s.Message()))
}

// jobText is a job for people.
func (t *terminal) jobText(j *pubsub.BroadcastJob) string {
	p := j.GetProgress()
	var b strings.Builder
	fmt.Fprintf(&b, "job %s: %s, for %s\n", clean(j.GetJobId()), t.jobState(j), clean(j.GetTarget()))
	fmt.Fprintf(&b, "  rate      %d users a second", j.GetRatePerSecond())
	if j.GetState() == pubsub.JobState_RUNNING {
		fmt.Fprintf(&b, ", %.1f lately%s", p.GetRate(), doneIn(p))
	}
	fmt.Fprintf(&b, "\n  targets   %s: delivered %d, offline %d, failed %d, unknown %d", targetsOf(p), p.GetDelivered(), p.GetOffline(), p.GetFailed(), p.GetUnknown())
	if p.GetInFlight() > 0 {
		fmt.Fprintf(&b, ", under way %d", p.GetInFlight())
	}
	for _, moment := range []struct {
		name string
		at   *timestamppb.Timestamp
	}{{"created", j.GetCreateTime()}, {"starts", j.GetSpec().GetStartTime()}, {"began", j.GetBeginTime()}, {"deadline", j.GetSpec().GetDeadline()}, {"ended", j.GetEndTime()}} {
		if moment.at != nil {
			fmt.Fprintf(&b, "\n  %-9s %s", moment.name, moment.at.AsTime().Local().Format(time.DateTime))
		}
	}
	if by := j.GetCreatedBy(); by != "" {
		b.WriteString("\n  by        " + clean(by))
	}
	if m := j.GetManagerId(); m != "" {
		b.WriteString("\n  runs at   " + clean(m))
	}
	for _, f := range p.GetNodeFailures() {
		b.WriteString("\n  " + clean(f.GetNodeId()) + ": " + t.paint(red, clean(f.GetReason())))
		if f.GetUsers() > 0 {
			b.WriteString(" (" + plural(f.GetUsers(), "user") + ")")
		}
	}
	return b.String()
}

// jobLine is a job in one line.
func (t *terminal) jobLine(j *pubsub.BroadcastJob) string {
	p := j.GetProgress()
	line := fmt.Sprintf("%s %s  %s: delivered %d, offline %d, failed %d, unknown %d", t.paint(grey, time.Now().Format(time.TimeOnly)), t.jobState(j),
		targetsOf(p), p.GetDelivered(), p.GetOffline(), p.GetFailed(), p.GetUnknown())
	if j.GetState() == pubsub.JobState_RUNNING {
		line += fmt.Sprintf(", %.0f/s%s", p.GetRate(), doneIn(p))
	}
	return line
}

func (t *terminal) jobState(j *pubsub.BroadcastJob) string {
	colour := yellow
	switch j.GetState() {
	case pubsub.JobState_RUNNING, pubsub.JobState_SUCCEEDED:
		colour = green
	case pubsub.JobState_FAILED, pubsub.JobState_CANCELLED:
		colour = red
	default:
	}
	text := t.paint(colour, j.GetState().String())
	if why := j.GetReason(); why != "" {
		text += " (" + clean(why) + ")"
	}
	return text
}

// targetsOf is how many targets there have been, of about how many.
func targetsOf(p *pubsub.JobProgress) string {
	text := strconv.FormatInt(p.GetTargets(), 10)
	if n := p.GetTargetsEstimate(); n > p.GetTargets() {
		text += " of ~" + strconv.FormatInt(n, 10)
	}
	return text
}

// doneIn says in how long a job will be done, and nothing while that is not known.
func doneIn(p *pubsub.JobProgress) string {
	if p.GetEta() == nil {
		return ""
	}
	return ", done in " + etaOf(p)
}

// etaOf is in how long a job will be done, "-" if it does not run, or has just begun.
func etaOf(p *pubsub.JobProgress) string {
	if p.GetEta() == nil {
		return "-"
	}
	return max(time.Until(p.GetEta().AsTime()), 0).Round(time.Second).String()
}
